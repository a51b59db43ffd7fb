"""How a study is driven: by Flower's simulation or in-process. Knows Flower's commands and internals."""

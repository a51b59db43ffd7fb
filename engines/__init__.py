"""How a study is driven: Flower's simulation or in-process; knows Flower's commands and internals."""

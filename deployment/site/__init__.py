"""A hospital's side of a deployment: joining a study, checking, approving code, working, leaving."""

"""The plan's sections, one module each; `semisam_core.plan` puts them together."""

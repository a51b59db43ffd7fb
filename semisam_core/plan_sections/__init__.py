"""The sections of the plan, one module each; `semisam_core.plan` assembles them."""

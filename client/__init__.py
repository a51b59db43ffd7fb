"""A hospital's side of the wire: its own policy, its local work, the egress gate and the audit log."""

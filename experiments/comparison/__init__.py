"""`semisam compare`: arms, their sites, their runs, their scores, the report."""

"""The collaboration lead's side of a deployed study: study folder, certificates, invitations, SuperLink, runs."""

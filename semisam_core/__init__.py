"""The method: SemiSAM+ in 3D. Imports torch and monai; never flwr, never server or client."""

import getpass
import os

__version__ = "0.2.0"

# A user id without an entry in passwd, as in a container started with `--user 1000`, has no name and may have no home.
# MONAI, PyTorch and Flower ask for both when they are imported. Child processes inherit what is set here.
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ["LOGNAME"] = f"uid-{os.getuid()}"
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = "/nonexistent"

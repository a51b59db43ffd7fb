"""The method: SemiSAM+ in 3D. Imports torch and monai; never flwr, never server or client."""

__version__ = "0.1.0"

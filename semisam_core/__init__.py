"""The method: SemiSAM+ in 3D. Imports torch and monai; never flwr, never server or client."""

__version__ = "0.2.0"

"""What a trained specialist is used for: prediction on new scans, and packages that others can check and run."""

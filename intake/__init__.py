"""From what a hospital has (DICOM, NIfTI, NRRD, MHA, h5) to the layout that a site trains on. Nothing here travels."""

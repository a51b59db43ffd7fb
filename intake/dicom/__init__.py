"""DICOM as a PACS exports it: series of images, and the labels that refer to them."""

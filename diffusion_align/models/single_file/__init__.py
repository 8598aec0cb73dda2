"""Models in one file with the key names of the original code (LDM, sgm): what a file is, how it is read and written."""

"""The quality laboratory: protocols of the papers, on folders of images or on a running pipeline."""

"""What runs on the device. Installed as ``negengine.kernels``; knows no method, no pipeline and no configuration."""

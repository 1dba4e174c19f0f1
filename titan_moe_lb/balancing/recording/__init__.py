"""Records of a rank's routers during training, on the device. Torch alone."""

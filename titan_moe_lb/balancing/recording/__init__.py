"""What a rank notes of its routers while it trains: on the device, torch alone."""

"""What a run leaves for people to read: metrics, curves and one HTML page."""

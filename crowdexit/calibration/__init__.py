"""What a calibration says of a network: intervals, temperatures, familiar images."""

"""CrowdExit: how many people are in front of the camera, from picture and sound, whenever the time is up."""

"""What a room or a scan is: objects with oriented boxes, posed views, and where they come from."""

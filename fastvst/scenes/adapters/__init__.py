"""Published annotations as scenes: Omni3D JSON (single images) and scans with posed frames (ScanNet style)."""

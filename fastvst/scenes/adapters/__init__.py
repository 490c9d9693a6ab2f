"""Other people's annotations as scenes: Omni3D JSON (single pictures) and scans with posed frames (ScanNet style)."""

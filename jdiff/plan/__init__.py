"""What a run would need and take on a machine that is not at hand: compiled for it ahead of time, or by arithmetic."""

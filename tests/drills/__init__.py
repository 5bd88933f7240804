"""Drills: what happens to runs (kills, damage, a full disk, signals ...) is done to small ones, some times or many."""

"""Small members of the families that people train, and what pbfx is to make of each."""

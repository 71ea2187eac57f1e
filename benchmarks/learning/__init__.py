"""Learning studies: what dendrites bring, against controls, at paired seeds."""

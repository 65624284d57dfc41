"""How new policies come to be: propose, verify, screen, race, hold out, promote."""

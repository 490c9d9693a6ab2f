"""What all operators share: backend choice, argument checks, tile tables."""

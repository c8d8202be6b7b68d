"""Operations with more than one implementation: `reference.py` defines, the others are faster."""

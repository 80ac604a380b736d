"""How good it is: oracle scores and quality reports."""

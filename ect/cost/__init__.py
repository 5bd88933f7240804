"""What a step costs and what its rounding does, found before it runs."""

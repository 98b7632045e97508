"""What the scripts share: pure mathematics and, apart from it, input and output."""

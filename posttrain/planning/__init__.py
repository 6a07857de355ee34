"""What a run takes of machines that are not at hand: memory a card by part, and hours, from arithmetic alone."""

"""Commands that check what others have left."""

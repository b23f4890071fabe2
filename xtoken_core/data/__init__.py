"""Documents to batches: reading, chats, rows, Arrow, collation."""

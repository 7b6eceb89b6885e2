"""What files from elsewhere may say, and how they are read and written. Two of them are copied beside remote code."""

"""Changes of networks: gates are inserted, branches found and removed, and what holds their parameters follows."""

"""Files: names, atomic writes and locks, each safe against neighbours, errors, kills and power cuts."""

"What becomes of hostile input, of kills, of full disks, and of large tables."

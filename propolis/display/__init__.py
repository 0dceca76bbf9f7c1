"""A VM's screen, keyboard and mouse for many clients: the copy of the picture, its encodings, and RFB."""

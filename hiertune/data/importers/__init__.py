"""Other people's files to hiertune's, one file for each kind of source."""

"""The mesh's certificate authority and the certificate service nodes ask."""

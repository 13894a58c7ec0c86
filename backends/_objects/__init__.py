"""What the backends of object stores and web servers share: the client library, patience, the chunk cache."""

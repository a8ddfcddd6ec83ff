"""The CoPD loop: everything below comes together here."""

"""jacobian_bounds"""

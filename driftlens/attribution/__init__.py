"""Attribution of forgetting: what was lost, booked to sites, routers and experts."""

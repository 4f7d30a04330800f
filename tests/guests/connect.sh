#!/bin/sh
# Connects a guest, IP, with the others. They are neighbours that do not age: else a client whose server is
# away waits for ARP, and backs off past the end of the server's grace period.
ip link set eth0 up
for k in 1 2 3 4; do
	[ "10.77.0.$k" = "$IP" ] || ip neigh replace 10.77.0.$k lladdr 02:00:0a:4d:00:0$k nud permanent dev eth0
done

package keystore

import "time"

// Clock are options with another clock than the machine's.
func (o RingOptions) Clock(now func() time.Duration) RingOptions {
	o.now = now
	return o
}

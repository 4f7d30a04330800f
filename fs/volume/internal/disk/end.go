package disk

// End is an offset behind the end of every file.
const End int64 = 1 << 62

// Types of entries, as in stat(2).
const (
	TypeFile = 0o100000
	TypeDir  = 0o040000
	TypeLink = 0o120000
)

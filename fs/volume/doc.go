// Package volume is the encrypted tree without FUSE: a ciphertext directory
// with its kmsfs.json, seen as plaintext nodes.
//
// [Init] makes a volume. [Find] finds one, [Found.Unlock] opens its volume key, and [Unlocked.Open]
// gives the tree. A [Node] is a file, directory or link as the kernel knows it, by a number that is
// never used twice; a [Handle] is an open file, a [Dir] an open directory. [OpenLone] reads one
// ciphertext file with no volume around it.
//
// Promises, kept by the rules of FORMAT.md, "The disk when the power
// fails":
//
//  1. Data that fsync or [Volume.Close] has confirmed is there after a power cut;
//     data of a closed file is there after a SIGKILL.
//  2. No interruption makes confirmed data unreadable: each page of 4 KiB reads as its old
//     or its new content, never as a mix, never as other bytes.
//  3. Bytes that were not authenticated are never returned, but for the zeros of holes. An error
//     that concerns a program's data reaches the program and the log.
//  4. On a full disk, a failing disk or a refusal by the key service, a file keeps its confirmed
//     content.
//
// Package disk below makes all syscalls on the ciphertext tree, relative to descriptors of
// directories, and never follows a symlink.
//
// The package, from top to bottom; calls go down:
//
//	volume.go                     Open and Close of a volume
//	walk, recipients, setkeys,    what goes on beside requests: repair, changes of keys, and keys
//	rewrap, rekey, inventory,     that are wiped or unwrapped ahead
//	lists, share, suspend, prefetch
//	create, listing, dir, attr,   requests for names and attributes
//	truncate
//	handle, io, load              requests for content: open, read, write
//	access                        whether content may be used, and its key
//	programlocks, lease, believe  in a shared volume: locks of programs, the right to write a file, and
//	                              what its header says by now
//	descriptors, settler          which files are kept open, and their final form
//	doubts, sessions, space, lost what is known of syncs, of this mount, of the disk, of lost bytes
//	dirlease, peers               in a shared volume: locks of directories, other hosts
//	domain                        lists of recipients, and which file is of which
//	file                          an open file: users, lock, descriptors, keys
//	nodes, node, dirfds           what the kernel knows, and where it is now
//	internal/cfile                one ciphertext file: pages, state, phases
//	internal/layout               names, directory IDs, marker, headers
//	internal/disk                 every syscall on the tree
//
// Locks, from the first to be taken to the last. No call to a key service is made under any but
// Recipients.mu, and access.mu for 5 s at most.
//
//	lock                held across syscalls?   who waits
//	Recipients.mu       yes, and across calls   the next change of the recipients; no request
//	                    to key services
//	Recipients.stable   shared while a header   files that are rewrapped, while a recipient is
//	                    is rewritten, alone     removed; no request
//	                    while one is removed
//	sessions.markerMu   while the marker is     the next change of the marker; no request
//	                    replaced, or a session
//	                    begins
//	access.mu           yes; not while lists    the next Suspend or Resume, and the use of new lists
//	                    are replaced            of recipients
//	Volume.crossing     yes                     renames from one directory to another, as in Linux
//	Node.entries        shared while an entry   in this directory, a removal or a rename waits for
//	                    is looked up or made,   all others, and all others wait for it
//	                    else alone
//	attributes.steady   shared by changes of    changes of this file's attributes and links, while
//	                    attributes and links,   a new key is put in its place
//	                    alone while the file
//	                    is replaced
//	Node.openMu         while the file is       the same for this file
//	                    opened, repaired,
//	                    rewrapped, closed
//	file.mu             shared by reads; alone  requests for this file's content; not those for its
//	                    for writes, truncation, attributes. A program's fsync does not hold it, but a
//	                    settling                sync that a write must wait for does (FORMAT.md, 4),
//	                                            and that of a file that was cut or has no key
//	lost.mu             while a file is read    the same for this file
//	                    of which bytes were
//	                    lost
//	Node.dirMu          while the ID of a       requests for a name in this directory
//	                    directory is read
//	hostLocks.long      while a long name is    the next change of a long name, in a shared volume
//	                    made, moved, removed
//	programLocks.mu     yes                     calls for locks of programs on this file
//	peers.looking       yes                     the next look for hosts that died; no request
//	peers.selfMu        yes                     the next proof of this host; no request
//	settler.mu          no
//	nodeTable.mu        no                      every request, for a moment
//	dirFDs.mu           no                      every request, for a moment
//	sessions.mu,        no; no other lock is
//	doubts.mu,          taken under them
//	absent.mu,
//	peers.mu,
//	leases.mu,
//	reports.mu,
//	file.showing.mu
//
// In a shared volume locks of other hosts are waited for, too, without any lock of this list but
// Node.entries, of a directory in which an entry is made or which is removed, and
// Recipients.mu: a lease is waited for without file.mu.
//
// So a request waits for the disk only as long as its own calls take, and those of requests that
// it has to do with. A call that finds no descriptor closes idle ones (descriptors.go): it only
// tries the locks of other files.
package volume

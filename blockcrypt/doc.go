// Package blockcrypt is the kmsfs format: headers, blocks, names, values and
// kmsfs.json. FORMAT.md beside this file is the normative description.
//
// It turns bytes into bytes. It does no I/O, knows no key service, keeps no
// global state and never logs; a caller reads and writes files around it.
//
//   - [Geometry] is the arithmetic between plaintext and ciphertext offsets.
//   - [ParseHeader] and [Header.Encode] are the codec of a file's header.
//   - [Header.Unlock] turns a data key into [FileKeys], which seal and open the
//     blocks of that file; it fails if the key is not the committed one.
//   - [VolumeKeys] encrypt names, symlink targets and extended attributes,
//     and authenticate origins, kmsfs.json and the session marker.
//
// What fails to authenticate is a [*DamageError] with its class; no function
// returns bytes that were not authenticated.
package blockcrypt

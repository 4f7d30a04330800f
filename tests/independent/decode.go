// Package independent decodes a kmsfs file as a stranger would: from
// blockcrypt/FORMAT.md, with Go's standard library alone, sharing no code with
// blockcrypt. The test vectors and the walk with the aws command line use it.
package independent

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Decode returns the plaintext of a clean ciphertext file under its data key.
// volumeKey, if there is one, checks the origin.
func Decode(file, dataKey, volumeKey []byte) ([]byte, error) {
	if len(file) == 0 {
		return nil, nil
	}
	if len(file) < 200 || string(file[:5]) != "kmsfs" || !bytes.Equal(file[5:8], []byte{0, 0, 1}) {
		return nil, errors.New("magic")
	}
	if file[10] != 1 || file[11] != 12 {
		return nil, errors.New("suite")
	}
	h := int(binary.BigEndian.Uint16(file[8:]))
	if h%512 != 0 || h < 512 || h > 65024 || len(file) < h {
		return nil, errors.New("header size")
	}
	if err := checkHeader(file[:h], volumeKey); err != nil {
		return nil, err
	}
	salt := append(append([]byte{}, file[16:32]...), file[32:48]...)
	derive := func(info string) []byte {
		k, err := hkdf.Key(sha256.New, dataKey, salt, info, 32)
		if err != nil {
			panic(err)
		}
		return k
	}
	if !bytes.Equal(derive("kmsfs v1 commit\x01"), file[64:96]) {
		return nil, errors.New("commitment")
	}
	mac := hmac.New(sha256.New, derive("kmsfs v1 state\x01"))
	mac.Write(file[:176])
	if !bytes.Equal(mac.Sum(nil)[:16], file[176:192]) {
		return nil, errors.New("state")
	}
	size := binary.BigEndian.Uint64(file[128:])
	flags := binary.BigEndian.Uint32(file[160:])
	if flags&5 != 0 {
		return nil, errors.New("the file is being written")
	}
	var plain []byte
	for k := 0; uint64(len(plain)) < size; k++ {
		page := h/4096 + k
		begin, end := page*4096, min((page+1)*4096, len(file))
		if k == 0 {
			begin = h
		}
		if begin >= end {
			return nil, fmt.Errorf("block %d is missing", k)
		}
		capacity := 4064 - (begin - page*4096)
		b := file[begin:end]
		if flags&2 != 0 && k > 0 && len(b) == 4096 && bytes.Count(b, []byte{0}) == 4096 {
			plain = append(plain, make([]byte, 4064)...)
			continue
		}
		out, err := block(b, k, capacity, derive)
		if err != nil {
			return nil, err
		}
		if plain = append(plain, out...); len(out) < capacity && uint64(len(plain)) != size {
			return nil, fmt.Errorf("block %d is short", k)
		}
		if last := uint64(len(plain)) == size; last && (len(file)+4095)/4096 != page+1 {
			return nil, errors.New("the file is too long")
		}
	}
	if uint64(len(plain)) != size {
		return nil, errors.New("size")
	}
	return plain, nil
}

func checkHeader(head, volumeKey []byte) error {
	list := int(binary.BigEndian.Uint16(head[192:]))
	if 200+list > len(head) {
		return errors.New("recipients")
	}
	var sum []byte
	sum = append(append(append(sum, head[:128]...), head[192:196]...), head[200:200+list]...)
	if crc32.Checksum(sum, crc32.MakeTable(crc32.Castagnoli)) != binary.BigEndian.Uint32(head[196:]) {
		return errors.New("checksum")
	}
	if binary.BigEndian.Uint32(head[112:]) != 0 {
		return errors.New("feature")
	}
	if volumeKey == nil {
		return nil
	}
	key, err := hkdf.Key(sha256.New, volumeKey, head[16:32], "kmsfs v1 origin", 32)
	if err != nil {
		return err
	}
	mac := hmac.New(sha256.New, key)
	mac.Write(head[:96])
	if !bytes.Equal(mac.Sum(nil)[:16], head[96:112]) {
		return errors.New("origin")
	}
	return nil
}

func block(b []byte, k, capacity int, derive func(string) []byte) ([]byte, error) {
	if len(b) < 33 {
		return nil, fmt.Errorf("block %d is cut short", k)
	}
	n := int(binary.BigEndian.Uint16(b))
	if n < 1 || n > capacity || 32+n > len(b) || len(bytes.TrimRight(b[32+n:], "\x00")) > 0 {
		return nil, fmt.Errorf("block %d has a bad length", k)
	}
	c, err := aes.NewCipher(derive("kmsfs v1 content\x01" + string(b[2:4])))
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(c)
	if err != nil {
		return nil, err
	}
	ad := append(binary.BigEndian.AppendUint64(nil, uint64(k)), b[:4]...)
	return gcm.Open(nil, b[4:16], b[16:32+n], ad)
}
